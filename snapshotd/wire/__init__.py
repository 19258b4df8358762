"""The contract both sides share: generated messages, the segment header, agreed numbers."""

"""The way out and the way in: images into files that others read, and a checkpoint into images."""

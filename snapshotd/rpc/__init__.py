"""Bytes in motion: gRPC between nodes, ZeroMQ to trainers. The only room that imports grpc."""

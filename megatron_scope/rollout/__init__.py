"""Rollout servers: the client, the embedded CPU server and its process."""

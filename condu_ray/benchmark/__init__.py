"""Streams of tasks to measure methods on, and the demo."""

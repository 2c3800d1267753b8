"""Measurements: Millis beside other engines, and quality beside a float32 reference."""

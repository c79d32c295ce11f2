"""Planted models: random weights of published shapes whose neurons fire as published."""

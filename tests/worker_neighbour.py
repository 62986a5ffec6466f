"""Imported by worker_functions.py, as a user's file imports the one beside it."""

NAME = "neighbour"

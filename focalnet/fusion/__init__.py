"""Runs several modules as one operator: checks that their parts are what the operator expects, and makes the call."""

"""Losses on preferences that are given: pairs, lists, labelled rows."""

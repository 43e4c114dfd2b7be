"""Seams into trainers: one thin file each, which imports its framework lazily."""

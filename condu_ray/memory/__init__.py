"""What is remembered of old classes instead of their pictures, and how it follows an encoder that moves.

NumPy alone: a library of its own, as fusion/ is.
"""

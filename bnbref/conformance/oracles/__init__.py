"""Oracles: of each operation what the rules allow its results to be, as a function of the operation's arguments.

codes.py: quantizations. values.py: what undoes them, and files. sums.py: float products and their gradients. steps.py:
optimizers.
"""

"""Backends with one planted fault each, and whether the kit catches them: the proof that a pass means something.

Each liar is torch_native but for one fault, and says which feature it breaks; `registry` has them all.
"""

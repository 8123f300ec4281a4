"""Monitors inside other people's training loops; each module needs the library it is named after.

``lightning.Certify`` and ``transformers.Certify`` are callbacks, ``tensorboard.TensorBoard`` writes scalars.
"""

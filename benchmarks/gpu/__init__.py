"""Tests and benchmarks on a GPU: ``benchmarks/gpu.sh`` runs all of it and saves ``results/gpu-NAME.json``.

``run.py`` has the list of parts; ``session.py`` what each of them may rely on.
"""

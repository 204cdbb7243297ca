"""Thin bridges to other harnesses: our suites inside lmms-eval and VLMEvalKit, our models inside theirs.

`python -m evals.bridges --help` writes a suite as they read it. Nothing here is imported by the rest of `evals`, and
only `evals.bridges.lmms_model` and `evals.bridges.vlmeval` want the other harness's package.
"""

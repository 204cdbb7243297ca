"""Our model as classes of transformers, which an exported folder brings along (:mod:`mmagent.interop.hub_folder`).

The modules here are written into every exported folder, together with all that they import of this library, and run
there without it. So they import torch, transformers, tokenizers and numpy, and nothing else.
"""

MODEL_TYPE, MODEL_CLASS = "mmagent", "MMAgentForConditionalGeneration"

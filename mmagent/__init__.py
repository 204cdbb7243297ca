"""mmagent: train a multimodal agent, from two frozen teachers to clicks in a browser.

Importing the package is cheap; rooms import torch and the model libraries when they are used.
"""

__version__ = "0.1.0"

"""The paper's tables and figures: declared in Python, run through main_repopt.py, and shown beside the paper."""

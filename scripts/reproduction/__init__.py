"""The paper's tables and figures as experiments: declared in YAML, run through main_repopt.py, shown beside the paper.

paper           the paper's numbers
experiment      a table or figure, as its YAML file declares it, at one scale
run             a training and seed as a command line, and what it leaves behind
quantities      numbers of runs and of networks, by the names that the YAML files use
drawings        figures, likewise
execute         run what is not done: side by side on a CPU, or one after the other on GPUs
cost            how long a run takes by the paper's own speed
result          a table with the paper beside, as Markdown and JSON
"""

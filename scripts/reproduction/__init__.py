"""The paper's tables and figures: declared in Python, run through main_repopt.py, and shown beside the paper.

paper           the paper's numbers
run             a training, and its runs: command lines, and what they leave behind
experiment      what a table or figure is
tables          all of them
quantities      cells: numbers of runs and of networks
figures         how figures are drawn
execute         run what is not done: side by side on a CPU, or one after the other on GPUs
cost            how long a run takes by the paper's own speed
result          a table with the paper beside, as Markdown and JSON
"""

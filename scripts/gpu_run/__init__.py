"""What ``scripts/gpu.py`` does, in stages. Standard library only: nothing is installed yet.

``machine``  the card, the cores and the tools at hand
``steps``    what there is to do, stage by stage
``verdicts`` what the output of a step means
``running``  steps as processes: logs, limits, several at a time
``state``    what is known from earlier runs, and how it is shown
"""

"""What every benchmark shares.

``case``       what a benchmark file describes
``discover``   which ops, and which wholes made of them, have one
``contenders`` who is timed: our implementations and their peers
``clock``      seconds of one call, on the CPU and on a CUDA device
``pairing``    interleaved rounds, so that a busy neighbour slows every contender alike
``statistics`` medians, ratios pair by pair
``floor``      what the machine can do at best, timed in the same rounds
``running``    a contender's call bound to its inputs
``measure``    one pass of a case, from inputs to figures
``alternate``  an op in turn with an operation of torch
``run``        all cases of an op
``machine``    what is measured on, from which code
``record``     the results as JSON, read strictly
``gate``       no figures from an op whose tests fail
``table``, ``chart``, ``summary``  the same figures to look at
"""

"""How fast the ops are, beside their peers and the floor of the machine: ``python -m benchmarks``.

``bench_<op>.py`` names the cases, inputs, work and peers of one op, or of what ops make up together
(``dit_blocks``); ``kit`` measures any of them;
``results/<device>/`` keeps what was measured. See ``docs/benchmarks.md``.
"""

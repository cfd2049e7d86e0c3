"""Captioned clips of moving shapes, rendered on the fly: the training set of the embedded model.

``scene``    the vocabulary, what is in a clip, which combinations are held out of training
``caption``  many phrasings of one scene
``render``   scenes to pixels
``batches``  a reproducible stream of (clips, captions): sample ``i`` depends on (seed, i) alone
"""

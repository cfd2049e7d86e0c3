"""Which layout for which GPUs: memory and time of a step, predicted from shapes, bytes and links.

Arithmetic only: nothing here imports torch or touches a device.
"""

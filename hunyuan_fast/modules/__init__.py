"""Neural network modules: they own parameters and call the ops; the models are put together from them."""

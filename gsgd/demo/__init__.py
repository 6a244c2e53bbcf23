"""``python -m gsgd.demo``: SGD and G-SGD on real data, from a start and from a rescaled copy of it."""

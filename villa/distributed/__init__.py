"""Distributed training: the processes, their shares of the work, and the reduction of gradients."""

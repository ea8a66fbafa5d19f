"""The device that commands run on, and the precision and kernels chosen for it."""

"""Device kernels of sigmoid attention and the code that launches them."""

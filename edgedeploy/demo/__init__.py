"""The demo: a small Fashion-MNIST classifier, dense and pruned, with the data to calibrate and judge it."""

"""Demo on scikit-learn's handwritten digits: no BN, torch.nn's BN and bn_ext's BN side by side."""

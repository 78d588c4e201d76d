"""The first minutes with a GPU: predictions of the kernels' model beside what is measured. See README.md."""

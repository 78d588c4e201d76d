"""Who is measured: names as they stand in results, without torch, which a report can do without."""

RIVAL = "torch.nn"
WITHOUT_CUDNN = "torch.nn, no cuDNN"
COMPILED = "torch.compile"
CUDNN_GRAPH = "cuDNN graph"
OURS = "bn_ext"
PROVIDERS = (RIVAL, WITHOUT_CUDNN, COMPILED, CUDNN_GRAPH, OURS)
EAGER = (RIVAL, WITHOUT_CUDNN)  # torch without its compiler, of which the faster one counts

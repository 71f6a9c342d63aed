"""Wave kernels: imported only where something is compiled."""

# Many processes on one GPU take turns by time slices, unless NVIDIA's own service (MPS) lets them run side by side.
# Sourced. It is a process of ours that ends with `alone`, and no setting of the GPU.
share() { # LOG: starts the service; goes on without where it is not there or a kernel does not run through it
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/attn-mps CUDA_MPS_LOG_DIRECTORY=/tmp/attn-mps-log; mkdir -p /tmp/attn-mps /tmp/attn-mps-log
  timeout 10 nvidia-cuda-mps-control -d > "$1" 2>&1 &&
    timeout 20 python3 -c "import torch; print(torch.ones(2, device='cuda').sum().item())" >> "$1" 2>&1 || alone
  echo "service for many processes: ${CUDA_MPS_PIPE_DIRECTORY:-none}"
}
alone() { # ends the service, if it was started
  [ -d "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && { echo quit | timeout 5 nvidia-cuda-mps-control; rm -rf /tmp/attn-mps; }
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

# Sourced by the multi-node launchers: environment of every rank. What is already set wins.
#
# Set here, because it is right on every H100 or B200 cluster:

# Token rounding and expert parallelism make buffers of changing size; segments that grow in place
# keep the allocator from splitting memory into pieces nobody can use. (PYTORCH_CUDA_ALLOC_CONF is
# this variable's older name.)
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# One line when NCCL cannot use what it found; INFO and NCCL_DEBUG_SUBSYS=INIT,NET show which
# network each connection took: "NET/IB" and "GDRDMA" are what you want, "NET/Socket" is not.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Set by TorchTitan from the run's [comm] table, so a value given here would be overridden:
#   TORCH_FR_BUFFER_SIZE            comm.trace_buf_size: collectives the flight recorder remembers
#   TORCH_NCCL_DUMP_ON_TIMEOUT=1    every rank writes them when a collective times out, to
#   TORCH_FR_DUMP_TEMP_FILE         DUMP_FOLDER/comm_traces/rank_N; the collective and the rank that
#                                   did not come: torchfrtrace DUMP_FOLDER/comm_traces -p rank_
#   TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# The timeouts are keys too: comm.init_timeout_seconds (300; start-up and the first step, which
# compiles) and comm.train_timeout_seconds (100; raise it when a checkpoint or a validation on one
# rank takes longer than that).
#
# Left alone, because only your site knows; NCCL's own choice is usually right:
#   NCCL_SOCKET_IFNAME   the interface of the bootstrap, when hosts have several (=eth0, ^docker0)
#   GLOO_SOCKET_IFNAME   the same for the CPU group that async checkpoints use
#   NCCL_IB_HCA          the compute network's adapters, when storage adapters are visible too
#   NCCL_NET_GDR_LEVEL   how far apart a GPU and an adapter may be for GPUDirect RDMA; it needs the
#                        nvidia-peermem module or dma-buf. SYS forces it, at a cost
#   NCCL_IB_GID_INDEX, NCCL_IB_TC, NCCL_IB_SL   RoCE networks only
#   NCCL_CROSS_NIC, NCCL_IB_QPS_PER_CONNECTION  rail-optimised networks, on your vendor's advice
#   NCCL_TOPO_FILE       virtual machines that hide PCIe
#   NCCL_MNNVL_ENABLE    GB200 racks (one NVLink domain over many hosts)

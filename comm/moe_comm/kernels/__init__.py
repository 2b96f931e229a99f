"""Local work of dispatch and combine on a GPU, in Triton; the CPU forms are in `moe_comm.routing`.

Nothing here is imported until rows live on a CUDA device, since Triton may be absent elsewhere.
"""

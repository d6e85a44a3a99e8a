"""The executor for GPUs, through wgpu: Vulkan, Metal and Direct3D 12. Needs the extra ``gpu``."""

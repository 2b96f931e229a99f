"""The command of a process that prepares data for another one."""

from moe_runtime.data.pool import serve

if __name__ == "__main__":
    serve()

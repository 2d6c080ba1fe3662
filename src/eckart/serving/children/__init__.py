"""A folder for PYTHONPATH: see `launch.carry_to_children`."""

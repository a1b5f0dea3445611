"""The parts of tools/gpu_report.py: the plan, who runs its steps, and the steps, each in a process of its own."""

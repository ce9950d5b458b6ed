"""What ours is compared with: a LoRA per task, the published merge, the peers as their users call them, the optimum."""

"""The algorithm: groups of responses, their rewards and advantages, the loss, and the programs that train with them."""

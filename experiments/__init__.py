"""What reproduces a table or figure, trains a policy or measures speed; each with its exact command."""

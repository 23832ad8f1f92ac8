"""What every command needs around its work: errors, flags, work done ahead. Standard library only."""

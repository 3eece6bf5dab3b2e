"""What a person looks at: plots; reads run directories only."""

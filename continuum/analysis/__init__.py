"""Questions asked of a flow: numbers out, and pictures of them."""

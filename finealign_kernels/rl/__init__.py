"""From rewards of segments to advantages of tokens: all of it constants of the policy loss that follows."""

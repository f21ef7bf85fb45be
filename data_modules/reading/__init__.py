"""How files become samples: pictures, class folders, tables and pickles read, and images kept in a cache on disk."""

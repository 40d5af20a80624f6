"""The source's data path: whoever names a migration and its token is served that guest's pages."""

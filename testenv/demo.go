package main

import "context"

func demo(ctx context.Context, args []string) error { _, _ = ctx, args; return nil }

package task

import "fmt"

// SharingError says that processes share something in a way in which they
// cannot be cloned again.
type SharingError struct {
	Process int // one between members of two groups
}

func (e *SharingError) Error() string {
	return fmt.Sprintf("process number %d stands between members of two groups that share something", e.Process)
}

// Share says how processes that share an object of one kind, such as a table of
// descriptors, come to share it again. parent are the indexes of their parents,
// -1 for the root, who comes before them; id names the object of each, 0 for
// one that has none. with tells who is cloned sharing his parent's, leave who
// gets one of his own again once all are there.
func Share(parent []int, id []uint32) (with, leave []bool, err error) {
	with, leave = make([]bool, len(parent)), make([]bool, len(parent))
	members := map[uint32][]int{}
	var order []uint32
	for i, x := range id {
		if x == 0 {
			continue
		}
		if len(members[x]) == 0 {
			order = append(order, x)
		}
		members[x] = append(members[x], i)
	}
	group := make([]uint32, len(parent)) // whose object a process has while all are made
	for _, x := range order {
		if len(members[x]) < 2 {
			continue
		}
		// Everybody between the members and their nearest common ancestor.
		passes := map[int]int{}
		for _, m := range members[x] {
			for i := m; i >= 0; i = parent[i] {
				passes[i]++
			}
		}
		top := members[x][0]
		for passes[top] < len(members[x]) {
			top = parent[top]
		}
		for _, m := range members[x] {
			for i := m; ; i = parent[i] {
				if group[i] != 0 && group[i] != x {
					return nil, nil, &SharingError{i}
				}
				group[i] = x
				leave[i] = id[i] != x
				if i == top {
					break
				}
				with[i] = true
			}
		}
	}
	return with, leave, nil
}
